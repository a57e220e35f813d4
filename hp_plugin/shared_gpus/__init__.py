"""Several ranks on one GPU over gloo: NCCL takes a GPU for one rank of a group, gloo does not look."""
