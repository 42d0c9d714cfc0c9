import pytest

from engram import native


@pytest.fixture(params=["native", "pytorch"])
def path(request, monkeypatch):
    """The test runs twice: with the native core and without."""
    if request.param == "native" and native.core() is None:
        pytest.skip("the native core is not built")
    if request.param == "pytorch":
        monkeypatch.setattr(native, "_core", None)
    return request.param
