"""The twins of minift on PyTorch and Triton: the same names, the same parameters, the same numbers, fast on a GPU.

`minift_kernels/quant/nf4.py` is to torch tensors what `minift/quant/nf4.py` is to NumPy arrays. Each public function
takes `backend=` beside the reference's parameters (`minift_kernels.backend`). Importing this imports torch, not triton.
"""
