# shellcheck shell=bash
# NVLM_SITE=infiniband: NVIDIA InfiniBand. Copy it, put your own names in, and set NVLM_SITE to the copy's path.
# None of these values was tried by us on such a cluster; they are what the vendors' pages say.

export NCCL_IB_HCA=${NCCL_IB_HCA:-mlx5}                      # cards that begin so; `ibstat -l` lists them. =mlx5_0 is exact
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}                # 17 s instead of 1: survives a switch that reroutes
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-^lo,docker}  # only the first words go this way: any real interface
# gloo (small exchanges of each step) takes the interface of the node's own name; where that is the wrong one:
# export GLOO_SOCKET_IFNAME=ib0
# where names lead to a network that the nodes cannot use among themselves:
# NVLM_MASTER_ADDR=$(srun --nodes=1 --ntasks=1 --nodelist="$FIRST_NODE" hostname --ip-address)
