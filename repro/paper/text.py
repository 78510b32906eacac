"""Numbers that stand in the text, outside any table, by section."""

from __future__ import annotations

from repro.paper.quantity import about, printed

# §2.2, on Table 3
MIMO_BELOW_MINIMAX_32K = about(13, "×", "§2.2", 0.5)
QWEN35_BELOW_QWEN3_32K = about(4, "×", "§2.2", 0.5)
RING_MEMORY_SAVING = about(36, "×", "§2.2", 1.0)
RING_SAVING_BY_MLA = printed("4.5", "×", "§2.2")
RING_SAVING_BY_RATIO = printed("8", "×", "§2.2")

# §2.3: 512 H200 GPUs at 8 GPUs per instance
FLEET_GPUS = 512
FLEET_GPUS_PER_INSTANCE = 8
EGRESS_MINIMAX_32K = printed("3.8", "Tbps", "§2.3")
EGRESS_QWEN3_32K = printed("2.1", "Tbps", "§2.3")
EGRESS_RING_32K = about(170, "Gbps", "§2.3", 5)
EGRESS_RING_128K_BELOW = about(100, "Gbps", "§2.3", 0)
DATACENTER_GPUS = 10_000
DATACENTER_EGRESS = about(1.8, "Tbps", "§2.3", 0.05)

# §4.1: the case study
PRFAAS_GPUS = 32
PD_GPUS = 64
HOMOGENEOUS_GPUS = 96
GPUS_PER_INSTANCE = 8
LINK = about(100, "Gbps", "§4.1", 5)
RDMA_PER_NODE = printed("800", "Gbps", "§4.1")
LENGTH_MU = printed("9.90", "ln tokens", "§4.1")
LENGTH_SIGMA = printed("1.00", "ln tokens", "§4.1")
LENGTH_MINIMUM_TOKENS = 128
# "128K" as 128·1024: the offloaded fraction at t = 19.4K is then 49.6 % as printed; with 128,000 it would be 49.5 %.
LENGTH_MAXIMUM_TOKENS = 131_072
LENGTH_MEAN = about(27_000, "tokens", "§4.1", 500)
OUTPUT_TOKENS = 1024
SLO_TOKENS_PER_S = 40.0

# §4.2 and §4.3
OFFLOAD_FRACTION = printed("0.496", "", "§4.3")
L_LONG = about(44_000, "tokens", "§4.3", 1_500)
EGRESS = about(13, "Gbps", "§4.3.1", 0.5)
LINK_UTILISATION = about(0.13, "", "§4.3.1", 0.005)
TTFT_P90_REDUCTION = printed("64", "%", "§4.2")
TTFT_MEAN_REDUCTION = printed("50", "%", "§4.2")
EQUAL_COST_GAIN = about(15, "%", "§4.2", 0.5)
IDC_EGRESS = about(1, "Tbps", "§4.3.1", 0.5)
