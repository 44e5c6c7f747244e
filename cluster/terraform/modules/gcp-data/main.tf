# What outlives the cluster: keys, models, the ledger's PostgreSQL. And Ray's Redis.

terraform {
  required_version = ">= 1.11, < 2.0"
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

data "google_project" "this" {
  project_id = var.project
}

# One key for all of it. Google's services use it under identities of their own.
resource "google_kms_key_ring" "this" {
  name     = var.name
  location = var.region
}

resource "google_kms_crypto_key" "this" {
  name            = var.name
  key_ring        = google_kms_key_ring.this.id
  rotation_period = "7776000s" # 90 days

  lifecycle {
    prevent_destroy = true
  }
}

resource "google_kms_crypto_key_iam_member" "services" {
  for_each = toset(["container-engine-robot", "compute-system", "gs-project-accounts", "gcp-sa-cloud-sql", "cloud-redis"])

  crypto_key_id = google_kms_crypto_key.this.id
  role          = "roles/cloudkms.cryptoKeyEncrypterDecrypter"
  member        = "serviceAccount:service-${data.google_project.this.number}@${each.key}.iam.gserviceaccount.com"
}

resource "google_storage_bucket" "models" {
  name                        = "${var.project}-${var.name}-models"
  location                    = var.region
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"
  force_destroy               = false

  versioning {
    enabled = true
  }

  encryption {
    default_kms_key_name = google_kms_crypto_key.this.id
  }

  lifecycle_rule {
    condition {
      num_newer_versions = 3
      with_state         = "ARCHIVED"
    }
    action {
      type = "Delete"
    }
  }

  lifecycle {
    prevent_destroy = true
  }

  depends_on = [google_kms_crypto_key_iam_member.services]
}

# Engines read models as the chart's own service account: no key file, no node's rights.
resource "google_storage_bucket_iam_member" "engines" {
  bucket = google_storage_bucket.models.name
  role   = "roles/storage.objectViewer"
  member = "principal://iam.googleapis.com/projects/${data.google_project.this.number}/locations/global/workloadIdentityPools/${var.project}.svc.id.goog/subject/ns/${var.namespace}/sa/${var.release}-worker"
}

ephemeral "random_password" "ledger" {
  length  = 32
  special = false
}

resource "google_sql_database_instance" "ledger" {
  name                = var.name
  region              = var.region
  database_version    = "POSTGRES_17"
  deletion_protection = true
  encryption_key_name = google_kms_crypto_key.this.id

  settings {
    tier                        = var.database_tier
    edition                     = "ENTERPRISE"
    availability_type           = "REGIONAL"
    disk_type                   = "PD_SSD"
    disk_autoresize             = true
    deletion_protection_enabled = true

    ip_configuration {
      ipv4_enabled       = false
      private_network    = var.network
      allocated_ip_range = var.managed_range
      ssl_mode           = "ENCRYPTED_ONLY"
    }

    backup_configuration {
      enabled                        = true
      start_time                     = "03:00"
      location                       = var.backup_location
      point_in_time_recovery_enabled = true
      transaction_log_retention_days = 7

      backup_retention_settings {
        retained_backups = 35
      }
    }

    insights_config {
      query_insights_enabled = true
    }

    maintenance_window {
      day  = 7
      hour = 4
    }
  }

  lifecycle {
    prevent_destroy = true
  }

  depends_on = [google_kms_crypto_key_iam_member.services]
}

resource "google_sql_database" "ledger" {
  name     = "headrace"
  instance = google_sql_database_instance.ledger.name
}

resource "google_sql_user" "ledger" {
  name                = "headrace"
  instance            = google_sql_database_instance.ledger.name
  password_wo         = ephemeral.random_password.ledger.result
  password_wo_version = var.password_version
}

# Written and never read back: the state holds no password of the ledger.
resource "google_secret_manager_secret" "ledger" {
  secret_id           = "${var.name}-ledger"
  deletion_protection = true

  replication {
    auto {}
  }
}

resource "google_secret_manager_secret_version" "ledger" {
  secret                 = google_secret_manager_secret.ledger.id
  secret_data_wo         = ephemeral.random_password.ledger.result
  secret_data_wo_version = var.password_version
}

resource "google_redis_instance" "gcs" {
  name                    = var.name
  region                  = var.region
  tier                    = "STANDARD_HA"
  memory_size_gb          = 1
  redis_version           = "REDIS_7_2"
  authorized_network      = var.network
  connect_mode            = "PRIVATE_SERVICE_ACCESS"
  reserved_ip_range       = var.managed_range
  auth_enabled            = true
  transit_encryption_mode = "SERVER_AUTHENTICATION"
  customer_managed_key    = google_kms_crypto_key.this.id

  depends_on = [google_kms_crypto_key_iam_member.services]
}
