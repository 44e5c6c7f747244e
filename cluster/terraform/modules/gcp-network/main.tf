# A network of private nodes: out by NAT, nothing in but by the load balancer.

terraform {
  required_version = ">= 1.11, < 2.0"
  required_providers {
    google = {
      source  = "hashicorp/google"
      version = "6.50.0"
    }
  }
}

variable "name" {
  type = string
}

variable "region" {
  type = string
}

variable "ranges" {
  description = "Addresses of nodes, pods, services and managed databases; none may overlap."
  type = object({
    nodes    = string
    pods     = string
    services = string
    managed  = object({ address = string, prefix_length = number })
  })
}

resource "google_compute_network" "this" {
  name                    = var.name
  auto_create_subnetworks = false
}

resource "google_compute_subnetwork" "nodes" {
  name                     = "${var.name}-nodes"
  region                   = var.region
  network                  = google_compute_network.this.id
  ip_cidr_range            = var.ranges.nodes
  private_ip_google_access = true

  secondary_ip_range {
    range_name    = "pods"
    ip_cidr_range = var.ranges.pods
  }

  secondary_ip_range {
    range_name    = "services"
    ip_cidr_range = var.ranges.services
  }

  log_config {
    aggregation_interval = "INTERVAL_5_MIN"
    flow_sampling        = 0.5
    metadata             = "INCLUDE_ALL_METADATA"
  }
}

resource "google_compute_router" "this" {
  name    = var.name
  region  = var.region
  network = google_compute_network.this.id
}

resource "google_compute_router_nat" "this" {
  name                               = var.name
  region                             = var.region
  router                             = google_compute_router.this.name
  nat_ip_allocate_option             = "AUTO_ONLY"
  source_subnetwork_ip_ranges_to_nat = "ALL_SUBNETWORKS_ALL_IP_RANGES"

  log_config {
    enable = true
    filter = "ERRORS_ONLY"
  }
}

# PostgreSQL and Redis live in Google's network, reached by peering only.
resource "google_compute_global_address" "managed" {
  name          = "${var.name}-managed"
  network       = google_compute_network.this.id
  purpose       = "VPC_PEERING"
  address_type  = "INTERNAL"
  address       = var.ranges.managed.address
  prefix_length = var.ranges.managed.prefix_length
}

resource "google_service_networking_connection" "managed" {
  network                 = google_compute_network.this.id
  service                 = "servicenetworking.googleapis.com"
  reserved_peering_ranges = [google_compute_global_address.managed.name]
}

output "network" {
  value = google_compute_network.this.id
}

output "subnetwork" {
  value = google_compute_subnetwork.nodes.id
}

output "managed_range" {
  description = "Once it stands, managed services can be made in the network."
  value       = google_compute_global_address.managed.name
  depends_on  = [google_service_networking_connection.managed]
}
