"""Tables that commands show."""
