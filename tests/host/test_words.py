"""A prompt is read the same however the word is written into it, through the host's own tokenizers and encoders."""

import logging
import unicodedata

import pytest

from tests.host.learned_words import encoder_of_prompts, same, vectors, with_token

LONG = "very " * 90

# prompt: how it reads when it is spelled plainly, with `WORD` where an embedding file is named
SAME_READING = {
    # the environment of an embedding, a weight, a bracket
    "(embedding:other:1.2),sainj toy": "(embedding:other:1.2), WORD toy",
    "(embedding:other:0.8)(sainj:1.2)": "(embedding:other:0.8)( WORD:1.2)",
    "embedding:other,sainj toy": "embedding:other, WORD toy",
    "embedding:other, sainj, embedding:other": "embedding:other, WORD , embedding:other",
    "(red embedding:other,sainj:1.2) toy": "(red embedding:other, WORD:1.2) toy",
    "embedding:other(sainj)": "embedding:other( WORD)",
    "(sainj:1.2)(sainj:0.8)": "( WORD:1.2)( WORD:0.8)",
    "(((sainj))),((red:1.1))": "((( WORD))),((red:1.1))",
    "[sainj|red]{sainj}": "[ WORD |red]{ WORD }",
    "\\(sainj\\) toy": "\\( WORD \\) toy",
    '<sainj>"sainj"': '< WORD >" WORD "',
    # separators
    "sainj_toy": "WORD _toy",
    "toy_sainj": "toy_ WORD",
    "_sainj_": "_ WORD _",
    "sainj-style, sainj/toy, sainj.": "WORD -style, WORD /toy, WORD .",
    "a photo of sainj BREAK sainj on grass": "a photo of WORD BREAK WORD on grass",
    "photo，sainj。": "photo， WORD 。",
    "（sainj：1.2）、「sainj」": "（ WORD ：1.2）、「 WORD 」",
    "embedding:other , sainj": "embedding:other , WORD",
    # other scripts around it
    "一张sainj的照片": "一张 WORD 的照片",
    "sainjの写真、赤いsainj": "WORD の写真、赤い WORD",
    "sainj는 귀여운sainj": "WORD 는 귀여운 WORD",
    "фотоsainj": "фото WORD",
    "ภาพsainjสีแดง": "ภาพ WORD สีแดง",
    "🐶sainj🐶": "🐶 WORD 🐶",
    # other forms of its own letters
    "ｓａｉｎｊ toy": "WORD toy",
    "ＳＡＩＮＪ的照片": "WORD 的照片",
    "SAİNJ toy": "WORD toy",
    "my sai\u200bnj\u200b toy": "my WORD \u200b toy",
    "sai\u00adnj\ufe0f toy": "WORD toy",
    # more than one part of a prompt
    LONG + "一张sainj的照片，sainj_toy": LONG + "一张 WORD 的照片， WORD _toy",
    "embedding:other,sainj " + LONG + "sainj_toy": "embedding:other, WORD " + LONG + "WORD _toy",
}

# Latin letters and digits beside it make another word; names of files are no words.
READ_AS_BEFORE = [
    "unsainjed",
    "sainjed toys",
    "presainj",
    "sainj2, 2sainj",
    "sainjé, ésainj",
    "sainj\u0301",
    "unsai\u00adnjed, un\u00adsainj",
    "ｓａｉｎｊｅｄ",
    "sain j",
    "embedding:sainj_style",
    "embedding:sainj_style, red",
    "(embedding:sainj_style:1.2), (embedding:sainj_style)",
    "embedding: sainj_style",
    "embedding:sainj，red",
    "a embedding:toys/sainj toy",
    "embedding:other,embedding:sainj",
    "embedding:some,sainj toy",
    "embedding:v2_\\(sainj\\)",
    "<lora:sainj_style:0.8> a toy, <lora:sainj:1>",
]


@pytest.fixture(scope="module")
def clips(load_checkpoint):
    return {kind: load_checkpoint(kind)[1] for kind in ("sd15", "sdxl")}


@pytest.fixture(scope="module")
def encode(comfy_host):
    return encoder_of_prompts(comfy_host)


@pytest.fixture(scope="module")
def tokens():
    return {"sd15": vectors(), "sdxl": vectors("clip_l", "clip_g")}


@pytest.fixture(scope="module")
def patched_clip(clips, tokens, comfy_host):
    """CLIPs that read `sainj` as the vectors that the embedding file `plain` holds."""
    import safetensors.torch

    folder = comfy_host.base / "models" / "embeddings"
    both = vectors("clip_l", "clip_g")
    contents = {"plain": both} | dict.fromkeys(("sainj", "sainj_style", "some,sainj", "v2_(sainj)"), None)
    for number, (name, of_name) in enumerate((contents | {"other": None, "toys/sainj": None}).items()):
        path = folder / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        safetensors.torch.save_file(of_name or vectors("clip_l", "clip_g", seed=90 + number), path)
    yield {kind: with_token(clip, tokens[kind]) for kind, clip in clips.items()}
    for name in [*contents, "other", "toys/sainj"]:
        (folder / f"{name}.safetensors").unlink()


def plain(prompt: str) -> str:
    return prompt.replace("WORD", "embedding:plain")


# --- where it is found ------------------------------------------------------------------------------------------------


def test_word_is_found_wherever_it_is_meant(encode, clips, patched_clip):
    for prompt, stock in SAME_READING.items():
        assert same(encode(patched_clip["sd15"], prompt), encode(clips["sd15"], plain(stock))), prompt


def test_both_encoders_of_sdxl_find_the_word(encode, clips, patched_clip):
    for prompt in ("(embedding:other:0.8)(sainj:1.2)", "sainj_toy", "一张sainj的照片"):
        assert same(encode(patched_clip["sdxl"], prompt), encode(clips["sdxl"], plain(SAME_READING[prompt]))), prompt

    sizes = dict.fromkeys(("width", "height", "target_width", "target_height"), 64) | {"crop_w": 0, "crop_h": 0}
    glued = {"text_g": "一张sainj的照片", "text_l": "(embedding:other:1.2),sainj toy"}
    spelled = {name: plain(SAME_READING[text]) for name, text in glued.items()}
    found, stock = (
        encode(of[("sdxl")], "", "CLIPTextEncodeSDXL", **texts, **sizes)
        for of, texts in ((patched_clip, glued), (clips, spelled))
    )
    assert same(found, stock)


def test_word_is_not_found_inside_other_words_and_names(encode, clips, patched_clip):
    for prompt in READ_AS_BEFORE:
        assert same(encode(patched_clip["sd15"], prompt), encode(clips["sd15"], prompt)), prompt


@pytest.mark.parametrize(
    "placeholder_token, prompt, stock",
    [
        ("小明", "一张小明的照片，小明2", "一张 WORD 的照片， WORD 2"),
        ("ポチ", "赤いポチのおもちゃ", "赤い WORD のおもちゃ"),
        ("ポチ", "赤いﾎﾟﾁのおもちゃ", "赤い WORD のおもちゃ"),
        ("민수", "귀여운 민수는", "귀여운 WORD 는"),
        ("민수", unicodedata.normalize("NFD", "민수") + " toy", "WORD toy"),
        ("жучок", "фото Жучок_2", "фото WORD _2"),
        ("toy-x9", "一张TOY-X9的照片,toy-x9_red", "一张 WORD 的照片, WORD _red"),
        ("<sks>", "photo<sks>toy", "photo WORD toy"),
        ("my_toyx", "a_my_toyx_standing", "a_ WORD _standing"),
        ("étoilx", "une e\u0301toilx, ÉTOILX", "une WORD , WORD"),
        ("e\u0301toilx", "une étoilx", "une WORD"),
        ("kırmz", "KIRMZ, kirmz, kırmz", "WORD , WORD , WORD"),
        ("straßx", "STRASSX", "WORD"),
        ("राजूक", "यह राजूक है", "यह WORD है"),
        ("ｗｕｂｂｏ", "my wubbo", "my WORD"),
    ],
)
def test_words_of_every_kind_are_found(encode, clips, patched_clip, tokens, placeholder_token, prompt, stock):
    from sa_inject.nodes.host.text import check_placeholder_token

    check_placeholder_token(clips["sd15"], placeholder_token)
    found = encode(with_token(clips["sd15"], tokens["sd15"], placeholder_token), prompt)
    assert same(found, encode(clips["sd15"], plain(stock)))


@pytest.mark.parametrize(
    "placeholder_token, prompt",
    [
        ("жучок", "жучоки"),
        ("राजूक", "राजूको"),
        ("toyx9", "toyx99, toyx9s"),
        ("étoilx", "etoilx, étoilxs"),
        ("wubbo", "wubbó, wubbo\u0308"),
    ],
)
def test_words_of_every_kind_are_not_found_in_longer_ones(encode, clips, tokens, placeholder_token, prompt):
    patched_clip = with_token(clips["sd15"], tokens["sd15"], placeholder_token)
    assert same(encode(patched_clip, prompt), encode(clips["sd15"], prompt))


@pytest.mark.parametrize("words", [("sain", "sainj"), ("sainj", "sainj-2"), ("小明", "小明明"), ("toyx", "my_toyx")])
def test_a_word_that_contains_another_is_read_as_itself(encode, clips, patched_clip, tokens, words):
    short, long = words
    both = with_token(with_token(clips["sd15"], vectors(seed=7), short), tokens["sd15"], long)
    other_way = with_token(with_token(clips["sd15"], tokens["sd15"], long), vectors(seed=7), short)
    expected = encode(clips["sd15"], plain("a WORD , WORD toy"))
    for clip in (both, other_way):
        assert same(encode(clip, f"a {long}, {long.upper()} toy"), expected)


# --- what the log says ------------------------------------------------------------------------------------------------


def complaints(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if "was not found in the prompt" in r.getMessage()]


def test_a_word_that_was_not_found_is_reported_once_for_each_text(encode, clips, tokens, caplog):
    clip = with_token(with_token(clips["sd15"], tokens["sd15"]), vectors(seed=3), "wubbo")
    for text in (
        "unsainjed toys",
        "unsainjed toys",
        "ｕｎｓａｉｎｊｅｄ",
        "sainj2 and sainj",
        "wubbos, unsainjed toys",
    ):
        encode(clip, text)
    said = complaints(caplog)
    assert [("'sainj'" in line, "wubbo'" in line) for line in said] == [(True, False), (True, False), (True, True)]
    assert "'unsainjed toys'" in said[0] and "Put a space beside it" in said[0]
    assert caplog.records[0].levelno == logging.WARNING


def test_nothing_is_reported_where_the_word_is_found_or_not_meant(encode, clips, patched_clip, caplog):
    for text in ("sainj", "", "a toy", "embedding:sainj_style", "embedding:other,sainj", "<lora:sainj:1> toy"):
        encode(patched_clip["sd15"], text)
    long_word = with_token(with_token(clips["sd15"], vectors(), "sain"), vectors(), "sainj")
    encode(long_word, "sainj toy")
    assert complaints(caplog) == []


# --- which words can be learned ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "placeholder_token",
    [
        "1.2",
        "1e5",
        "---",
        "<3",
        "{a|b}",
        "a//b",
        "/*x",
        "\u200b",
        "\u0301abc",
        "ａ：ｂ",
        "ｅmbeddingx",
        "ab\u3000c",
        "ｄｏｇ",
    ],
)
def test_words_that_could_not_be_found_or_would_change_prompts_are_refused(clips, placeholder_token):
    from sa_inject.nodes.host.text import check_placeholder_token

    with pytest.raises(ValueError, match="The placeholder token "):
        check_placeholder_token(clips["sd15"], placeholder_token)


def test_captions_follow_the_rule_of_prompts(clips, patched_clip):
    from sa_inject.nodes.host.text import finder

    has_word = finder(clips["sd15"], "sainj")
    assert all(has_word(prompt) for prompt in SAME_READING)
    assert not any(has_word(prompt) for prompt in READ_AS_BEFORE)


# --- the folders of the host ------------------------------------------------------------------------------------------


def test_the_word_is_read_without_a_look_into_the_embeddings_folders(encode, clips, patched_clip, monkeypatch):
    import comfy.sd1_clip

    looks = []
    walk = comfy.sd1_clip.expand_directory_list
    monkeypatch.setattr(comfy.sd1_clip, "expand_directory_list", lambda found: looks.extend(found) or walk(found))
    expected = encode(clips["sd15"], plain("my WORD , a red WORD toy"))
    looks.clear()
    assert same(encode(patched_clip["sd15"], "my sainj, a red sainj toy"), expected)
    assert looks == []
    encode(patched_clip["sd15"], "my sainj, embedding:other")
    assert looks != []


def test_marks_that_somebody_writes_are_names_like_others(encode, clips, patched_clip):
    for prompt in ("embedding:sa-inject-token-7 toy", "embedding:sa-inject-token-x"):
        assert same(encode(patched_clip["sd15"], prompt), encode(clips["sd15"], prompt)), prompt
