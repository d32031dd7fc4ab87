//! Body of the fuzz target for the network card.
