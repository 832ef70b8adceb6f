"""Pictures of a trace: files, pages, coloured text. Loaded when one is asked for."""
