"""The modules that put settings, data, backends and the rest of the core together: the only ones that know them all."""
