//! The bundled bare-metal guest: its program, command line and output.
