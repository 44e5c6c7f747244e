variable "name" {
  type = string
}

variable "project" {
  type = string
}

variable "region" {
  type = string
}

variable "backup_location" {
  description = "Another region than the database's: backups must outlive it."
  type        = string
}

variable "network" {
  type = string
}

variable "managed_range" {
  type = string
}

variable "namespace" {
  description = "Where the chart is installed."
  type        = string
}

variable "release" {
  description = "The chart's release, or its fullnameOverride: its service accounts are named by it."
  type        = string
}

variable "database_tier" {
  type = string
}

variable "password_version" {
  description = "Raise it to rotate the ledger's password."
  type        = number
}
