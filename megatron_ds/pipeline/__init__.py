"""Pipeline schedules as data: order tables, their lowering to instructions, a simulator and the layer partition."""
