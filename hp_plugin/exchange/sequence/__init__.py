"""The exchange `sequence`: whole heads of a share of the queries, against all keys."""
