"""What tests ask of bitsandbytes' own library before they choose their parameters: there is none, and no GPU."""

BNB_BACKEND = "CPU"
HIP_ENVIRONMENT = False
ROCM_GPU_ARCH = "unknown"
ROCM_WARP_SIZE_64 = False
lib = None
