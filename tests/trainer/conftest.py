"""All tests of this folder compute in one thread."""

from tests.one_thread import one_thread  # noqa: F401
