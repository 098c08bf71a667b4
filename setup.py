"""The one part of the package that is compiled; everything else about it stands in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "lightning_moe.nn.csrc.tile_kernels",
            ["lightning_moe/nn/csrc/tile_kernels.c"],
            # Neither -ffast-math, which makes a library flush denormal numbers in the whole process, nor -march=native,
            # since a wheel or a container may run on another processor than that which built it.
            extra_compile_args=["-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"],
            optional=True,  # torch's operations do the same where there is no compiler
        )
    ]
)
