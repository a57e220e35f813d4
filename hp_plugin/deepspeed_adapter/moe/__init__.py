"""DeepSpeed-MoE in the place of the MLP, its experts spread over the ranks of the grid."""
