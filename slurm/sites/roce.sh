# shellcheck shell=bash
# NVLM_SITE=roce: RDMA over converged Ethernet. Copy it and ask the site for its values: a wrong index or class is slow, not
# an error.
# None of these values was tried by us on such a cluster; they are the usual ones.

export NCCL_IB_HCA=${NCCL_IB_HCA:-mlx5}
export NCCL_IB_GID_INDEX=${NCCL_IB_GID_INDEX:-3} # RoCE v2; `show_gids` lists them
export NCCL_IB_TC=${NCCL_IB_TC:-106}             # the lossless traffic class of the switches
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-^lo,docker}
