"""Programs that run in other libraries' own environments, for studies that measure beside them."""
