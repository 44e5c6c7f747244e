# Headrace on GKE. `terraform init -backend-config=backend.hcl`, then plan and apply with a tfvars file.

terraform {
  required_version = ">= 1.11, < 2.0"

  # Bucket and prefix come from backend.hcl: state is shared, versioned, locked and encrypted.
  backend "gcs" {}

  required_providers {
    google = {
      source  = "hashicorp/google"
      version = "6.50.0"
    }
    random = {
      source  = "hashicorp/random"
      version = "3.7.2"
    }
  }
}

provider "google" {
  project = var.project
  region  = var.region
}

module "pools" {
  source = "../modules/pools"

  values_file       = "${path.module}/../../charts/headrace/values-gke.yaml"
  accelerator_label = "cloud.google.com/gke-accelerator"
}

module "network" {
  source = "../modules/gcp-network"

  name   = var.name
  region = var.region
  ranges = var.ranges
}

module "data" {
  source = "../modules/gcp-data"

  name             = var.name
  project          = var.project
  region           = var.region
  backup_location  = var.backup_location
  network          = module.network.network
  managed_range    = module.network.managed_range
  namespace        = var.namespace
  release          = var.release
  database_tier    = var.database_tier
  password_version = var.password_version
}

module "cluster" {
  source = "../modules/gke"

  name                = var.name
  project             = var.project
  region              = var.region
  zones               = var.zones
  network             = module.network.network
  subnetwork          = module.network.subnetwork
  autopilot           = var.autopilot
  control_plane_range = var.control_plane_range
  administrators      = var.administrators
  maintenance         = var.maintenance
  managed_prometheus  = var.managed_prometheus
  kms_key             = module.data.kms_key
  cpu_machine_type    = var.cpu_machine_type
  cpu_nodes_max       = var.cpu_nodes_max
  groups              = module.pools.groups
  machines            = var.machines
  upgrade_surge_ratio = var.upgrade_surge_ratio
}
