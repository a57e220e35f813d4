"""Fused routing of mixtures, which Megatron-Core imports without asking and uses on request."""

fused_compute_score_for_moe_aux_loss = fused_moe_aux_loss = fused_topk_with_score_function = None
