"""What this machine has, how many bytes a model needs, and whether it fits."""

from helpers.base.lazy import face

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "anatomy": ["CONFIGS", "count_parameters", "parameter_table", "published_config", "published_models"],
        "driver": ["Driver", "DriverError", "ask_driver"],
        "hardware": [
            "Bandwidth",
            "DiskSpeed",
            "Gpu",
            "Machine",
            "detect",
            "detect_apart",
            "disk_read_speed",
            "download_folder",
            "memory_bandwidth",
        ],
        "memory": ["MemoryEstimate", "Workload", "estimate", "kv_bytes_per_token", "weight_bytes"],
        "placement": [
            "Devices",
            "Placement",
            "RESERVED",
            "Resident",
            "Shortfall",
            "largest_context",
            "least_gpus",
            "parts_by_device",
            "place",
            "place_together",
            "shortfall",
        ],
        "sharding": ["hardware_claims", "implied_utilisation", "shard", "training_flop"],
        "step": ["Training"],
    },
)
