# Node pools of a Standard cluster: one for CPU work, one per group of GPUs that the chart wants.

resource "google_container_node_pool" "cpu" {
  count = var.autopilot ? 0 : 1

  name     = "cpu"
  cluster  = local.cluster.id
  location = var.region

  autoscaling {
    total_min_node_count = 3
    total_max_node_count = var.cpu_nodes_max
    location_policy      = "BALANCED"
  }

  management {
    auto_repair  = true
    auto_upgrade = true
  }

  upgrade_settings {
    max_surge       = 1
    max_unavailable = 0
  }

  node_config {
    machine_type      = var.cpu_machine_type
    disk_type         = "pd-balanced"
    disk_size_gb      = 100
    boot_disk_kms_key = var.kms_key
    image_type        = "COS_CONTAINERD"
    service_account   = google_service_account.nodes.email
    oauth_scopes      = ["https://www.googleapis.com/auth/cloud-platform"]

    workload_metadata_config {
      mode = "GKE_METADATA"
    }

    shielded_instance_config {
      enable_secure_boot          = true
      enable_integrity_monitoring = true
    }

    gcfs_config {
      enabled = true
    }
  }
}

resource "google_container_node_pool" "gpu" {
  for_each = var.autopilot ? {} : var.groups

  name     = each.key
  cluster  = local.cluster.id
  location = var.region
  # GPUs are not in every zone.
  node_locations = var.machines[each.value.accelerator].zones

  # Ray's autoscaler asks for pods, GKE makes the nodes, wherever there is one.
  autoscaling {
    total_min_node_count = 0
    total_max_node_count = each.value.max_nodes * (1 + var.upgrade_surge_ratio)
    location_policy      = "ANY"
  }

  management {
    auto_repair  = true
    auto_upgrade = true
  }

  # GPUs for a surge can seldom be had.
  upgrade_settings {
    max_surge       = 0
    max_unavailable = 1
  }

  node_config {
    spot              = each.value.spot
    machine_type      = var.machines[each.value.accelerator].machine_type
    disk_type         = var.machines[each.value.accelerator].disk_type
    disk_size_gb      = 200
    boot_disk_kms_key = var.kms_key
    image_type        = "COS_CONTAINERD"
    service_account   = google_service_account.nodes.email
    oauth_scopes      = ["https://www.googleapis.com/auth/cloud-platform"]

    guest_accelerator {
      type  = each.value.accelerator
      count = each.value.gpus

      gpu_driver_installation_config {
        gpu_driver_version = "LATEST"
      }
    }

    # GKE itself labels the accelerator and gke-spot, and taints nvidia.com/gpu.
    dynamic "taint" {
      for_each = each.value.spot ? ["cloud.google.com/gke-spot"] : []
      content {
        key    = taint.value
        value  = "true"
        effect = "NO_SCHEDULE"
      }
    }

    workload_metadata_config {
      mode = "GKE_METADATA"
    }

    shielded_instance_config {
      enable_secure_boot          = true
      enable_integrity_monitoring = true
    }

    gvnic {
      enabled = true
    }

    # Image streaming: a GPU image is tens of gigabytes.
    gcfs_config {
      enabled = true
    }
  }
}
