import pytest

from engram import native


def _available():
    core = native.core()
    if core is None:
        return []
    sets = [name for name in ("portable", "avx2", "avx512") if core.limit_instruction_set(name)]
    core.limit_instruction_set("")
    return sets


@pytest.fixture(autouse=True, scope="module", params=["pytorch", *_available()])
def kernel(request):
    """Every test of this folder holds on PyTorch alone and on every instruction set that this machine has."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "pytorch":
            patch.setattr(native, "_core", None)
        else:
            native.core().limit_instruction_set(request.param)
        yield request.param
    if native.core() is not None:
        native.core().limit_instruction_set("")
