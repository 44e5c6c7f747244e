# A private cluster, Standard with node pools or Autopilot without.

terraform {
  required_version = ">= 1.11, < 2.0"
  required_providers {
    google = {
      source  = "hashicorp/google"
      version = "6.50.0"
    }
  }
}

locals {
  cluster = var.autopilot ? google_container_cluster.autopilot[0] : google_container_cluster.standard[0]
}

resource "google_container_cluster" "standard" {
  count = var.autopilot ? 0 : 1

  name                = var.name
  location            = var.region
  node_locations      = var.zones
  network             = var.network
  subnetwork          = var.subnetwork
  deletion_protection = true

  # The pools stand below, each for itself.
  remove_default_node_pool = true
  initial_node_count       = 1

  # Dataplane V2 enforces the chart's network policies.
  datapath_provider         = "ADVANCED_DATAPATH"
  enable_shielded_nodes     = true
  networking_mode           = "VPC_NATIVE"
  default_max_pods_per_node = 64

  private_cluster_config {
    enable_private_nodes    = true
    enable_private_endpoint = true
    master_ipv4_cidr_block  = var.control_plane_range
  }

  master_authorized_networks_config {
    dynamic "cidr_blocks" {
      for_each = var.administrators
      content {
        display_name = cidr_blocks.key
        cidr_block   = cidr_blocks.value
      }
    }
  }

  ip_allocation_policy {
    cluster_secondary_range_name  = "pods"
    services_secondary_range_name = "services"
  }

  workload_identity_config {
    workload_pool = "${var.project}.svc.id.goog"
  }

  database_encryption {
    state    = "ENCRYPTED"
    key_name = var.kms_key
  }

  binary_authorization {
    evaluation_mode = "PROJECT_SINGLETON_POLICY_ENFORCE"
  }

  release_channel {
    channel = "REGULAR"
  }

  # GKE moves nodes in this window only.
  maintenance_policy {
    recurring_window {
      start_time = var.maintenance.start_time
      end_time   = var.maintenance.end_time
      recurrence = var.maintenance.recurrence
    }
  }

  gateway_api_config {
    channel = "CHANNEL_STANDARD"
  }

  addons_config {
    gcs_fuse_csi_driver_config {
      enabled = true
    }
    dns_cache_config {
      enabled = true
    }
  }

  cost_management_config {
    enabled = true
  }

  logging_config {
    enable_components = ["SYSTEM_COMPONENTS", "WORKLOADS"]
  }

  monitoring_config {
    enable_components = var.managed_prometheus ? ["SYSTEM_COMPONENTS", "DCGM", "POD", "DEPLOYMENT"] : ["SYSTEM_COMPONENTS"]

    managed_prometheus {
      enabled = var.managed_prometheus
    }
  }

  node_config {
    service_account = google_service_account.nodes.email
  }

  lifecycle {
    ignore_changes = [initial_node_count, node_config]
  }
}

resource "google_container_cluster" "autopilot" {
  count = var.autopilot ? 1 : 0

  name                = var.name
  location            = var.region
  network             = var.network
  subnetwork          = var.subnetwork
  enable_autopilot    = true
  deletion_protection = true

  private_cluster_config {
    enable_private_nodes    = true
    enable_private_endpoint = true
    master_ipv4_cidr_block  = var.control_plane_range
  }

  master_authorized_networks_config {
    dynamic "cidr_blocks" {
      for_each = var.administrators
      content {
        display_name = cidr_blocks.key
        cidr_block   = cidr_blocks.value
      }
    }
  }

  ip_allocation_policy {
    cluster_secondary_range_name  = "pods"
    services_secondary_range_name = "services"
  }

  database_encryption {
    state    = "ENCRYPTED"
    key_name = var.kms_key
  }

  binary_authorization {
    evaluation_mode = "PROJECT_SINGLETON_POLICY_ENFORCE"
  }

  release_channel {
    channel = "REGULAR"
  }

  maintenance_policy {
    recurring_window {
      start_time = var.maintenance.start_time
      end_time   = var.maintenance.end_time
      recurrence = var.maintenance.recurrence
    }
  }

  cost_management_config {
    enabled = true
  }

  # Autopilot always has managed Prometheus.
  cluster_autoscaling {
    auto_provisioning_defaults {
      service_account   = google_service_account.nodes.email
      boot_disk_kms_key = var.kms_key
    }
  }
}

# What nodes may do: write logs and metrics, pull images. Pods have identities of their own.
resource "google_service_account" "nodes" {
  account_id   = "${var.name}-nodes"
  display_name = "Nodes of the cluster ${var.name}"
}

resource "google_project_iam_member" "nodes" {
  for_each = toset(["roles/container.defaultNodeServiceAccount", "roles/artifactregistry.reader"])

  project = var.project
  role    = each.key
  member  = "serviceAccount:${google_service_account.nodes.email}"
}
