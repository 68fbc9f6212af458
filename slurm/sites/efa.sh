# shellcheck shell=bash
# NVLM_SITE=efa: AWS Elastic Fabric Adapter, as on ParallelCluster and HyperPod. NCCL needs the aws-ofi-nccl plugin for it,
# on the nodes or in the container; NCCL_DEBUG=INFO must say "Selected provider is efa", or all goes over TCP.
# None of these values was tried by us on such a cluster; they are what the vendor's pages say.

export FI_PROVIDER=${FI_PROVIDER:-efa}
export FI_EFA_SET_CUDA_SYNC_MEMOPS=${FI_EFA_SET_CUDA_SYNC_MEMOPS:-0}
export FI_EFA_FORK_SAFE=${FI_EFA_FORK_SAFE:-1} # the data loader forks
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-^lo,docker,veth}
