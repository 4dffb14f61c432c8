"""Sparse mixture of experts: who is chosen (router, balance), how tokens get there and back (dispatch), what is done."""
