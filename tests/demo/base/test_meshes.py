"""Models are read with their colours, assembled at rest, and rendered from the requested side."""

import struct

import numpy as np
import pytest
from PIL import Image

from sa_inject.demo.base import meshes
from sa_inject.demo.base.artwork import LARGE, find, objects, views_of
from sa_inject.demo.base.meshes import load_obj, load_stl, load_urdf, picture, upright

OBJ = b"""mtllib a.mtl
v 0 0 0\nv 1 0 0\nv 1 0 1\nv 0 0 1
vt 0 0\nvt 1 0\nvt 1 1\nvt 0 1
usemtl painted
f 1/1 2/2 3/3 4/4
usemtl red
f -4//1 -2//1 -1//1
"""
MTL = b"newmtl painted\nmap_Kd a.png\nnewmtl red\nKd 1 0 0\n"
URDF = b"""<robot name="two">
<material name="blue"><color rgba="0 0 1 1"/></material>
<link name="base"><visual><geometry><box size="1 1 1"/></geometry><material name="blue"/></visual></link>
<link name="arm"><visual><origin xyz="0 0 1"/><geometry><sphere radius="0.5"/></geometry></visual></link>
<joint name="j" type="fixed"><parent link="base"/><child link="arm"/><origin xyz="0 0 2" rpy="0 1.5707963 0"/></joint>
</robot>"""


@pytest.fixture(autouse=True)
def fewer_points(monkeypatch):
    monkeypatch.setattr(meshes, "POINTS", 100_000)


def reader(**files: bytes):
    return lambda path: files[path.replace(".", "_").replace("/", "__")]


def texture() -> bytes:
    import io

    image = Image.new("RGB", (2, 2), "lime")
    image.putpixel((0, 1), (0, 0, 255))  # below on the left, where u and v are 0
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_faces_of_a_model_have_the_texture_or_colour_of_their_material():
    painted, red = load_obj("a.obj", reader(a_obj=OBJ, a_mtl=MTL, a_png=texture()))
    assert painted.corners.shape == (2, 3, 3) and painted.texture is not None
    assert red.corners.tolist() == [[[0, 0, 0], [1, 0, 1], [0, 0, 1]]] and red.colour == (1, 0, 0)
    seen = np.asarray(picture([painted], yaw=0, elevation=0)).astype(int)
    left_below, right_above = seen[120, 6], seen[6, 120]
    assert left_below[2] > 100 > left_below[1] and right_above[1] > 100 > right_above[2]


def test_a_texture_that_is_not_there_leaves_a_plain_colour():
    painted, _ = load_obj("a.obj", reader(a_obj=OBJ, a_mtl=MTL))
    assert painted.texture is None and painted.colour == meshes.PLAIN


def test_a_binary_stl_is_its_triangles():
    corners = np.arange(9, dtype=np.float32)
    data = b" " * 80 + struct.pack("<I", 1) + np.zeros(3, np.float32).tobytes() + corners.tobytes() + b"\0\0"
    assert load_stl(data).corners.ravel().tolist() == list(range(9))


def test_links_lie_where_the_joints_before_them_put_them():
    box, ball = load_urdf("a.urdf", reader(a_urdf=URDF))
    assert box.colour == (0, 0, 1)
    assert np.abs(box.corners).max(axis=(0, 1)) == pytest.approx([0.5] * 3)
    assert ball.corners.reshape(-1, 3).mean(axis=0) == pytest.approx([1, 0, 2], abs=0.03), "turned, then lifted"
    assert np.linalg.norm(ball.corners - (1, 0, 2), axis=-1) == pytest.approx(0.5)


def test_what_is_nearer_hides_what_is_behind_and_turning_round_swaps_them():
    square = load_obj("a.obj", reader(a_obj=OBJ.split(b"usemtl red")[0]))[0]
    near, far = (
        square._replace(colour=(1.0, 0, 0)),
        square._replace(colour=(0, 0, 1.0), corners=square.corners + (0, 1, 0)),
    )
    front, back = (np.asarray(picture([near, far], yaw, elevation=0))[64, 64] for yaw in (0, 180))
    assert front[0] > 100 > front[2] and back[2] > 100 > back[0]
    assert min(front[3], back[3]) > 100


def test_an_upright_model_has_its_second_axis_up():
    square = load_obj("a.obj", reader(a_obj=OBJ.replace(b" 0 1", b" 1 0")))
    assert upright(square)[0].corners[..., 2].max() == pytest.approx(1)


def test_a_picture_is_the_same_every_time_and_clear_around_the_object():
    surfaces = load_urdf("a.urdf", reader(a_urdf=URDF))
    first, again, other = (picture(surfaces, yaw) for yaw in (30, 30, 120))
    assert first.tobytes() == again.tobytes() != other.tobytes()
    assert first.size == (meshes.SIDE, meshes.SIDE) and first.getpixel((0, 0))[3] == 0


def test_fifteen_subjects_of_the_large_world_are_seen_from_eight_sides():
    solid = {artwork.word for artwork in objects("held_out", LARGE) if artwork.vendor == "pybullet"}
    assert len(solid) >= 15
    assert {len(views_of(find(word, LARGE))) for word in solid} == {8}
    assert views_of(find("robot", LARGE)) == (find("robot", LARGE),)
    assert not solid & {artwork.word for artwork in objects("base", LARGE)}
