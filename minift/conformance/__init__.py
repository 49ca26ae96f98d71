"""The properties that every implementation must satisfy, as a product."""
