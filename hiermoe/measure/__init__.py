"""What is measured: one short file each, all with one interface; `hiermoe.measure.registry` lists them."""
