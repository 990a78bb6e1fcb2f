"""Every numerical tolerance of the suite, beside the error that was measured (CPU and interpreter).  At most 5x the measured one."""

# op against the fp64 oracle, over all kinds of rows and V in {7 .. 262144}.  What is promised; measured: 0.22 of the logp bound
# (2.2e-6 at logp = -37), 9.9e-7 for the entropy
LOGP_FP32 = 2e-6
LOGP_FP32_RELATIVE = 2.0**-22
ENTROPY_FP32 = 2e-6
STATS_FP64 = 5e-12           # measured 1.8e-12 (lse at offset 1e4), 1.6e-14 elsewhere
GRAD_FP32 = 2.5e-6           # of a gradient of size 3; measured 5.2e-7
CONFIDENT_LABEL = 2e-6         # of a gradient of 1; measured 8.8e-7: the fp32 sum s = 1 + many small terms
EAGER_FACTOR = 1.1           # half precision: at most this times eager PyTorch's own error on the same input

# across tensor-parallel sizes; measured 1.0e-6 (logp), 7e-7 (entropy), 6e-8 (gradient of size 1)
TP_LOGP = 2e-6
TP_ENTROPY = 2e-6
TP_GRAD = 3e-7

# loss, NLL, entropy and gradient norm of 20 steps, every layout against one rank: 5 decimals
LAYOUTS = 5e-6

# a twin against autograd of its PyTorch form, per token, relative; measured 4.8e-7.  A GPU's exp2 is good to 2^-22, its argument to |x| 2^-24
TWIN = 2e-6

# one-pass op against the two-pass fp64 oracle, every loss, absolute and relative; measured 7.9e-7 per token, 6.3e-7 for sums of 3 to 6 tokens
TERMS = 3e-6
LOSS_SUM = 3e-6

# hidden-in ops against dense logits in fp64: per-token values (absolute and relative), gradients as ||error|| / ||truth||
LINEAR_VALUES = 2e-6         # fp32; measured 5.9e-7
LINEAR_GRAD = 2e-6           # fp32; measured 7.5e-7
LINEAR_FP64 = 1e-14          # both; measured 2.1e-15
LINEAR_FP32_LOGITS = 1e-2    # gradients in bf16 from fp32 logits; measured 3.1e-3, bf16's own rounding
LINEAR_CHUNKS = 2e-6         # one chunk size against another, fp32; measured 8.3e-7

# C++ on the CPU: bf16 and fp16 gradients against the oracle (absolute, relative: half an ulp); mm_fp32_ as a share of sum |a| |b|
GRAD_BF16 = (2.0**-10, 2.0**-8)
GRAD_FP16 = (2.0**-13, 2.0**-11)
MM_FP32 = 6e-7                # measured 2.0e-7
LINEAR_MEGATRON = 7e-7       # every parameter of a small GPT against the logits path; measured 1.6e-7

# context parallelism: every parameter's gradient of a small GPT against one rank, ||error|| / ||truth||; measured 1.7e-6
CONTEXT_GRAD = 5e-6

# one step in every layout against one rank with megatron-core's own head: loss relative, gradient of each parameter as ||error|| / ||truth||
LAYOUT_LOSS = 1e-6           # measured 1.8e-7 (24 layouts: megatron_plugin/hooks/LAYOUTS.md)
LAYOUT_GRAD = 1e-5           # measured 2.7e-6

# logits of up to 5 of a GPTModel with imported weights against transformers, fp32, absolute; measured 3.5e-6 (12 tokens), 6.2e-6 (512)
HF_LOGITS = 2e-5

# an attached loss against megatron-core's own head and loss: per token (absolute and relative), gradients as ||error|| / ||truth||
ATTACH_LOSS = 5e-7           # measured 1.2e-7
ATTACH_GRAD = 2.5e-6         # measured 5.2e-7
# measured 2.2e-3 and 8.9e-8: in fp16 both ways run the same GEMMs here; where they do not, half an ulp is 5e-4
ATTACH_HALF = {"bf16": 1e-2, "fp16": 1e-3}
ATTACH_STEPS = 1.5e-5        # weights after three steps, absolute; measured 3.2e-6

# statistics of rows whose logits are around 1e9, whose reference is rounded to 64 binary orders, fp32; measured 1.4e-6
LOGP_FAR = 6e-6
# error of a padded head's gradients over that of the same head without padding; measured 1.0 (CPU), 1.5 with the widths of a GPU
PADDED_HEAD = 2.0

# one step's gradient against the dense objective in fp64, however it is split; absolute, gradients of size 0.1 to 0.8; and objectives, relative
NORMALISER_GRAD = 6e-7       # measured 1.4e-7
NORMALISER_LOSS = 4e-7       # measured 9.8e-8

# drop-ins against the framework's own loss: change of the weights after two steps of SFTTrainer, as ||error|| / ||truth||, measured 2.1e-6 (rounding of
# the weights); losses and gradient norms of three train_steps, relative, measured 2.2e-7; verl's losses and gradients in fp32, measured 0
DROPIN_TRL = 1e-5
DROPIN_MEGATRON_LM = 1e-6
DROPIN_VERL = 1e-7

# nats, trainer's log p of a sampled token against that of vLLM, both fp32: measured 4.8e-7 on random weights of 0.8 M parameters; the bound asked for
ENGINE_LOGP = 1e-4

# ours beside other implementations, docs/parity.md: values relative (absolute below 1), gradients over their largest entry.  fp32: the bound asked for;
# measured 4e-6 (Liger), 3e-6 (TRL, verl, Trinity-RFT).  fp64: measured 9e-8; the normaliser's coefficients are fp32, some denominators of theirs have + 1e-8
PARITY_FP32 = 1e-5
PARITY_FP64 = 2e-7
