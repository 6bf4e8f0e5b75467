"""The MLX backend: Metal on a Mac, the CPU on Linux.

Nothing of MLX is imported here. The package's first act is to make sure that MLX, whenever it comes, finds a fast BLAS:
every module that imports `mlx` lives in this package, so none can be earlier.
"""

from backends.mlx.blas import preload_blas

preload_blas()
