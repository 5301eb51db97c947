//! HTTP: several dialects into one internal request, events back out. No tensor in here.
