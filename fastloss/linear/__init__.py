"""The linear map and its loss in chunks of rows, without the logits of all rows."""
