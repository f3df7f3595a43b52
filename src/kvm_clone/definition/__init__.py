"""Domain XML: read, rewritten and marked. Pure: XML in, XML out."""
