//! RMS, layer and group normalisation.
