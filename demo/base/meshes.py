"""Renders solid objects from several sides, from URDF models, as point clouds.

It reads what the models of pybullet_data need: OBJ with materials and textures, binary STL, boxes, cylinders, spheres.
"""

import io
import math
import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

Read = Callable[[str], bytes]  # a file of the package by its path

POINTS: int = 1_000_000  # on all surfaces together
SIDE: int = 128
OVERSAMPLED: int = 2
ELEVATION: float = 25.0  # degrees above the horizon
LIGHT: tuple[float, float, float] = (0.4, -0.6, 0.7)  # towards the light, as seen by the viewer: right, forward, up
AMBIENT: float = 0.5
PLAIN: tuple[float, float, float] = (0.75, 0.75, 0.78)  # if a model has no colour


class Surface(NamedTuple):
    """Triangles of one colour or texture."""

    corners: np.ndarray  # (n, 3, 3)
    colour: tuple[float, float, float]
    uv: np.ndarray | None = None  # (n, 3, 2)
    texture: np.ndarray | None = None  # (h, w, 3) in 0..1


def _numbers(text: str | None, default: str) -> np.ndarray:
    return np.array([float(word) for word in (text or default).split()])


def _beside(path: str, name: str) -> str:
    """A file named relative to another one. `..` is resolved."""
    parts = [*path.split("/")[:-1], *name.replace("package://", "").split("/")]
    found: list[str] = []
    for part in parts:
        if part == "..":
            found.pop()
        elif part != ".":
            found.append(part)
    return "/".join(found)


def _pose(element: ET.Element | None) -> np.ndarray:
    """The matrix of an <origin>: roll, pitch, yaw and position. -> (4, 4)"""
    pose = np.eye(4)
    if element is None:
        return pose
    roll, pitch, yaw = _numbers(element.get("rpy"), "0 0 0")
    for axis, angle in ((0, roll), (1, pitch), (2, yaw)):
        pose[:3, :3] = _rotation(axis, angle) @ pose[:3, :3]
    pose[:3, 3] = _numbers(element.get("xyz"), "0 0 0")
    return pose


def _rotation(axis: int, angle: float) -> np.ndarray:
    """Rotation around one axis, in radians. -> (3, 3)"""
    cos, sin = math.cos(angle), math.sin(angle)
    first, second = ((1, 2), (2, 0), (0, 1))[axis]
    turned = np.eye(3)
    turned[first, first] = turned[second, second] = cos
    turned[first, second], turned[second, first] = -sin, sin
    return turned


def load_urdf(path: str, read: Read) -> list[Surface]:
    """All visible surfaces of a robot or a thing, its joints at rest."""
    root = ET.fromstring(read(path).lstrip())
    named = {}
    for material in root.iter("material"):
        colour = material.find("color")
        if colour is not None:
            named[material.get("name")] = tuple(_numbers(colour.get("rgba"), "1 1 1 1")[:3])
    joints = {j.find("child").get("link"): j for j in root.findall("joint")}  # type: ignore[union-attr]  # required
    surfaces: list[Surface] = []
    for link in root.findall("link"):
        pose, name = np.eye(4), link.get("name")
        while name in joints:
            pose = _pose(joints[name].find("origin")) @ pose
            name = joints[name].find("parent").get("link")  # type: ignore[union-attr]  # required
        for visual in link.findall("visual"):
            shape = visual.find("geometry")[0]  # type: ignore[index]  # required
            material = visual.find("material")
            colour = named.get(material.get("name")) if material is not None else None
            there = pose @ _pose(visual.find("origin"))
            for surface in _shape(shape, path, read):
                corners = surface.corners @ there[:3, :3].T + there[:3, 3]
                tint = colour if colour is not None and surface.texture is None else surface.colour
                surfaces.append(surface._replace(corners=corners, colour=tint))
    return surfaces


def _shape(shape: ET.Element, path: str, read: Read) -> list[Surface]:
    if shape.tag == "mesh":
        file = _beside(path, shape.get("filename", ""))
        found = load_obj(file, read) if file.lower().endswith(".obj") else [load_stl(read(file))]
        scale = _numbers(shape.get("scale"), "1 1 1")
        return [surface._replace(corners=surface.corners * scale) for surface in found]
    if shape.tag == "box":
        grid, scale = _grid(1), _numbers(shape.get("size"), "1 1 1") / 2
        faces = [np.roll(grid * (1, 1, sign), axis, axis=-1) for axis in range(3) for sign in (1, -1)]
        return [Surface(np.concatenate(faces) * scale, PLAIN)]
    radius = float(shape.get("radius", "1"))
    if shape.tag == "sphere":
        angles = (_grid(24)[..., :2] + 1) / 2 * (2 * math.pi, math.pi)
        around, down = angles[..., 0], angles[..., 1]
        return [
            Surface(radius * _stack(np.sin(down) * np.cos(around), np.sin(down) * np.sin(around), np.cos(down)), PLAIN)
        ]
    half, grid = float(shape.get("length", "1")) / 2, _grid(24)
    around = (grid[..., 0] + 1) * math.pi
    wall = _stack(radius * np.cos(around), radius * np.sin(around), half * grid[..., 1])
    reach = radius * (grid[..., 1] + 1) / 2
    lids = [_stack(reach * np.cos(around), reach * np.sin(around), np.full_like(around, z)) for z in (half, -half)]
    return [Surface(np.concatenate([wall, *lids]), PLAIN)]


def _stack(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    return np.stack([x, y, z], axis=-1)


def _grid(cells: int) -> np.ndarray:
    """The square from -1 to 1 at height 1, as triangles. -> (2 * cells**2, 3, 3)"""
    i, j = (axis.ravel() for axis in np.mgrid[0:cells, 0:cells])
    corner = [np.stack([i + a, j + b], axis=-1) / cells * 2 - 1 for a, b in ((0, 0), (1, 0), (1, 1), (0, 1))]
    flat = np.concatenate([np.stack([corner[k] for k in order], axis=1) for order in ((0, 1, 2), (0, 2, 3))])
    return np.concatenate([flat, np.ones((*flat.shape[:2], 1))], axis=-1)


def load_stl(data: bytes) -> Surface:
    """Read a binary STL file."""
    record = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("spare", "<u2")])
    return Surface(
        np.frombuffer(data[84:], record, int.from_bytes(data[80:84], "little"))["corners"].astype(float), PLAIN
    )


def load_obj(path: str, read: Read) -> list[Surface]:
    """Read an OBJ file. -> one surface for each material"""
    vertices: list[list[float]] = []
    places: list[list[float]] = []
    faces: dict[str, list[tuple[tuple[int, int], ...]]] = {}
    materials: dict[str, dict[str, list[str]]] = {}
    current = ""
    for line in read(path).decode("utf-8", "replace").splitlines():
        word, *rest = line.split() or [""]
        if word == "v":
            vertices.append([float(x) for x in rest[:3]])
        elif word == "vt":
            places.append([float(x) for x in rest[:2]])
        elif word == "usemtl":
            current = rest[0] if rest else ""
        elif word == "mtllib":
            materials |= _materials(_beside(path, " ".join(rest)), read)
        elif word == "f":
            corners = [_corner(text, len(vertices), len(places)) for text in rest]
            fan = faces.setdefault(current, [])
            fan += [(corners[0], a, b) for a, b in zip(corners[1:], corners[2:], strict=False)]
    points, uv = np.array(vertices), np.array(places or [[0.0, 0.0]])
    surfaces = []
    for name, triangles in faces.items():
        index = np.array(triangles)  # (n, 3, 2)
        material = materials.get(name, {})
        colour = tuple(float(x) for x in material["Kd"][:3]) if "Kd" in material else PLAIN
        texture = _texture(_beside(path, " ".join(material["map_Kd"])), read) if "map_Kd" in material else None
        surfaces.append(Surface(points[index[..., 0]], colour, uv[index[..., 1]] if places else None, texture))
    return surfaces


def _corner(text: str, vertices: int, places: int) -> tuple[int, int]:
    """Indices of a corner, counted from 0: vertex and texture coordinate. Of `7`, `7/3`, `7/3/1` or `-1//-1`."""
    vertex, place, *_ = [*text.split("/"), ""]
    numbers = int(vertex), int(place or 1)
    return tuple(n - 1 if n > 0 else count + n for n, count in zip(numbers, (vertices, places), strict=True))  # type: ignore[return-value]


def _materials(path: str, read: Read) -> dict[str, dict[str, list[str]]]:
    found: dict[str, dict[str, list[str]]] = {}
    name = ""
    try:
        lines = read(path).decode("utf-8", "replace").splitlines()
    except KeyError:
        return found
    for line in lines:
        word, *rest = line.split() or [""]
        if word == "newmtl":
            name = rest[0] if rest else ""
        elif word in ("Kd", "map_Kd") and rest:
            found.setdefault(name, {})[word] = rest
    return found


def _texture(path: str, read: Read) -> np.ndarray | None:
    try:
        return np.asarray(Image.open(io.BytesIO(read(path))).convert("RGB")) / 255
    except KeyError:
        return None


def upright(surfaces: list[Surface]) -> list[Surface]:
    """Rotate a model whose second axis points up."""
    turn = _rotation(0, math.pi / 2)
    return [surface._replace(corners=surface.corners @ turn.T) for surface in surfaces]


def picture(surfaces: list[Surface], yaw: float, elevation: float = ELEVATION) -> Image.Image:
    """Render from far away, rotated by `yaw` degrees. -> RGBA, SIDE by SIDE"""
    rng = np.random.RandomState(0)
    turn = _rotation(0, math.radians(elevation)) @ _rotation(2, math.radians(yaw))
    areas = [np.linalg.norm(np.cross(*_edges(surface.corners)), axis=1) for surface in surfaces]
    whole = sum(area.sum() for area in areas)
    points, colours = [], []
    for surface, area in zip(surfaces, areas, strict=True):
        if not area.sum():
            continue
        count = max(50, round(POINTS * area.sum() / whole))
        chosen = rng.choice(len(area), count, p=area / area.sum())
        weights = rng.dirichlet((1, 1, 1), count)[..., None]  # (count, 3, 1)
        corners = surface.corners[chosen] @ turn.T
        points.append((corners * weights).sum(axis=1))
        normals = np.cross(*_edges(corners))
        normals /= np.linalg.norm(normals, axis=1, keepdims=True) + 1e-12
        normals *= np.where(normals[:, 1:2] > 0, -1, 1)  # towards the viewer, who looks along +y
        light = np.array(LIGHT) / np.linalg.norm(LIGHT)
        shade = AMBIENT + (1 - AMBIENT) * np.clip(normals @ light, 0, 1)[:, None]
        colours.append(shade * _colour(surface, chosen, weights))
    return _splat(np.concatenate(points), np.concatenate(colours))


def _edges(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]


def _colour(surface: Surface, chosen: np.ndarray, weights: np.ndarray) -> np.ndarray:
    if surface.texture is None or surface.uv is None:
        return np.array(surface.colour)
    height, width, _ = surface.texture.shape
    u, v = ((surface.uv[chosen] * weights).sum(axis=1) % 1).T
    rows, columns = ((1 - v) * height).astype(int), (u * width).astype(int)
    return surface.texture[rows.clip(0, height - 1), columns.clip(0, width - 1)]


def _splat(points: np.ndarray, colours: np.ndarray) -> Image.Image:
    """The nearest point of every pixel. points (n, 3) as right, forward, up; colours (n, 3)"""
    side = SIDE * OVERSAMPLED
    x, z = points[:, 0], points[:, 2]
    scale = (side - 2) / max(np.ptp(x), np.ptp(z))
    columns = ((x - x.min()) * scale + 1).astype(int).clip(0, side - 1)
    rows = ((z.max() - z) * scale + 1).astype(int).clip(0, side - 1)
    order = np.argsort(-points[:, 1], kind="stable")  # the nearest is written last
    canvas = np.zeros((side, side, 4))
    canvas[rows[order], columns[order]] = np.concatenate([colours[order], np.ones((len(order), 1))], axis=1)
    pixels = (canvas.clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(pixels).convert("RGBa").resize((SIDE, SIDE), Image.Resampling.BOX).convert("RGBA")
