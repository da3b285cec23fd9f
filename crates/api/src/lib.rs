//! D-Bus interfaces of Godwit, server and client side.
