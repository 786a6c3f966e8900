"""The order-desk demo world."""
