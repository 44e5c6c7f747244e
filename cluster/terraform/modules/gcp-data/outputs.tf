output "kms_key" {
  description = "Once Google's services may use it."
  value       = google_kms_crypto_key.this.id
  depends_on  = [google_kms_crypto_key_iam_member.services]
}

output "models_bucket" {
  value = google_storage_bucket.models.name
}

output "postgres_host" {
  value = google_sql_database_instance.ledger.private_ip_address
}

output "postgres_secret" {
  description = "Secret Manager's name of the password."
  value       = google_secret_manager_secret.ledger.secret_id
}

output "redis_address" {
  description = "For the chart's redis.address."
  value       = "rediss://${google_redis_instance.gcs.host}:${google_redis_instance.gcs.port}"
}

output "redis_password" {
  value     = google_redis_instance.gcs.auth_string
  sensitive = true
}

output "redis_certificates" {
  description = "Ray must trust them (RAY_REDIS_CA_CERT)."
  value       = google_redis_instance.gcs.server_ca_certs[*].cert
}
