"""Builds the optional native core; everything else is in pyproject.toml. Where it cannot be built, engram runs on PyTorch alone."""

import sys

from setuptools import Extension, setup

SOURCES = "src/engram/native/csrc"
# No errno: a square root that might set it cannot be vectorised. Results are those of IEEE arithmetic either way.
# GCC 12 takes what its own headers leave undefined on purpose for a mistake, hundreds of times.
UNIX = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-pthread", "-fno-math-errno", "-Wno-maybe-uninitialized"]
FLAGS = ["/O2", "/std:c++17"] if sys.platform == "win32" else UNIX

setup(
    ext_modules=[
        Extension(
            "engram.native._core",
            sources=[f"{SOURCES}/{name}.cpp" for name in ("module", "hash", "gated", "gather", "loops", "read", "rows")],
            depends=[
                f"{SOURCES}/{name}"
                for name in (
                    "clones.h",
                    "gated.h",
                    "gather.h",
                    "gather_loops.inc",
                    "hash.h",
                    "hash_loops.inc",
                    "loops.h",
                    "parallel.h",
                    "read.h",
                    "rows.h",
                )
            ],
            extra_compile_args=FLAGS,
            extra_link_args=[] if sys.platform == "win32" else ["-pthread"],
            py_limited_api=True,
            optional=True,  # no compiler, no harm
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
