"""The exchange `batch`: whole heads of a share of the samples."""
