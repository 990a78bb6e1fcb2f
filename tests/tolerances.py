"""Every numerical tolerance of the suite, beside the error that was measured (CPU and interpreter).  At most 5x the measured one."""

# op against the fp64 oracle.  logp: absolute part measured 1.2e-6 (V = 262144, offset 1e4); entropy: 1.5e-6 (V = 262144, std 3)
LOGP_FP32 = 2e-6
LOGP_FP32_RELATIVE = 2.0**-22
ENTROPY_FP32 = 2e-6
STATS_FP64 = 5e-12           # measured 1.8e-12 (lse at offset 1e4), 1.6e-14 elsewhere
GRAD_FP32 = 3e-6             # of a gradient of size 3; measured 7.1e-7
EAGER_FACTOR = 1.1           # half precision: at most this times eager PyTorch's own error on the same input

# across tensor-parallel sizes; measured 1.0e-6 (logp), 7e-7 (entropy), 6e-8 (gradient of size 1)
TP_LOGP = 2e-6
TP_ENTROPY = 2e-6
TP_GRAD = 3e-7
