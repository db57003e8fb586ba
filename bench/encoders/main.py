"""Subject and prompt fidelity of existing pictures: DINO, CLIP-I and CLIP-T with encoders from local files.

    python dev.py bench encoders --generated G --dataset D --clip-vision FILE --clip FILE --dino FOLDER

G holds <method>/<subject>/ with pictures and a prompts.json. It maps each picture's name to its prompt, with the class
word in place of the placeholder token. D holds <subject>/ with real pictures, as DreamBench's dataset/ does. The CLIP
files are ones that ComfyUI loads from models/clip_vision and models/text_encoders. A whole CLIP model in one file can
be both. FOLDER is a DINO model as transformers saves it, such as facebook/dino-vits16. Scores of different CLIP models
are not comparable. Published ones often use ViT-B/32, which ComfyUI does not load.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from ..bootstrap import interval
from ..host import start_host
from ..report import Row, device_slug, environment, print_json, publish
from .encoders import METRICS, Encoders, Subject, find_subjects, score

COLUMNS = ("method", "subjects", "pictures", *(name for metric in METRICS for name in (metric, f"{metric} 95 %")))


def main() -> None:
    logging.getLogger().setLevel(logging.WARNING)
    options = arguments()
    try:
        subjects = find_subjects(options.generated, options.dataset)
        start_host(with_pack=False)
        encoders = Encoders(options.clip_vision, options.clip, options.dino)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for subject in subjects:
        scores.setdefault(subject.method, {})[subject.name] = score(encoders, subject)
        print(f"  {subject.method}: {subject.name}", flush=True)
    result = {
        "generated": options.generated.resolve().name,
        "clip_vision": options.clip_vision.name,
        "clip": options.clip.name,
        "dino": options.dino.resolve().name,
        "environment": environment(),
        "rows": [row(method, by_subject, subjects) for method, by_subject in scores.items()],
        "scores": scores,
    }
    stem = f"{result['generated']}-{device_slug()}"
    publish("encoders", "Subject and prompt fidelity", stem, result, COLUMNS, quick=False)
    print_json({"bench": "encoders", "results": [result]})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generated", type=folder, required=True, help="<method>/<subject>/ with prompts.json")
    parser.add_argument("--dataset", type=folder, required=True, help="<subject>/ with real pictures")
    parser.add_argument("--clip-vision", type=file, required=True, help="CLIP's image encoder, with its projection")
    parser.add_argument("--clip", type=file, required=True, help="the same CLIP's text encoder, with its projection")
    parser.add_argument("--dino", type=folder, required=True, help="DINO ViT-S/16 as saved by transformers")
    return parser.parse_args()


def file(path: str) -> Path:
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"there is no file '{path}'")
    return Path(path)


def folder(path: str) -> Path:
    if not Path(path).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder '{path}'")
    return Path(path)


def row(method: str, by_subject: dict[str, dict[str, float]], subjects: list[Subject]) -> Row:
    """Means over subjects. Each subject counts once."""
    pictures = sum(len(subject.prompts) for subject in subjects if subject.method == method)
    found: Row = {"method": method, "subjects": len(by_subject), "pictures": pictures}
    for metric in METRICS:
        values = [of_subject[metric] for of_subject in by_subject.values()]
        ends = interval(values)
        found[metric] = sum(values) / len(values)
        found[f"{metric} interval"] = ends
        found[f"{metric} 95 %"] = f"{ends[0]:.3f} to {ends[1]:.3f}" if ends else "one subject"
    return found
