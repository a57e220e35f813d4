"""What a comparison shows: table, page, picture, and predictions beside it."""
