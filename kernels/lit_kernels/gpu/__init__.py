"""The Triton kernels and their launches; the modules above say what they compute and when they are taken."""
