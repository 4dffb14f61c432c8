"""One frozen configuration tree: the schema, how it is loaded, and the rules that span sections."""
