# shellcheck shell=bash
# NVLM_SITE=ethernet: plain TCP, no RDMA. Enough for LoRA; for ZeRO-3 of a large decoder see `nvlm-train plan --link-gbps`.
# None of these values was tried by us on such a cluster.

export NCCL_IB_DISABLE=${NCCL_IB_DISABLE:-1}                 # or NCCL may find a card that leads nowhere
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-^lo,docker}
export NCCL_SOCKET_NTHREADS=${NCCL_SOCKET_NTHREADS:-4} NCCL_NSOCKS_PERTHREAD=${NCCL_NSOCKS_PERTHREAD:-4}
