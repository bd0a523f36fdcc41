"""Where other libraries call clinfast by name."""
