# What everything else stands on: the services of the project, the names, and the key's users.

locals {
  labels = { app = var.name }

  services = toset(concat(
    [
      "artifactregistry.googleapis.com",
      "cloudresourcemanager.googleapis.com",
      "compute.googleapis.com",
      "dataflow.googleapis.com",
      "iam.googleapis.com",
      "iamcredentials.googleapis.com",
      "logging.googleapis.com",
      "monitoring.googleapis.com",
      "storage.googleapis.com",
    ],
    var.cmek == null ? [] : ["cloudkms.googleapis.com"],
    var.budget == null ? [] : ["billingbudgets.googleapis.com"],
    try(var.job.schedule, null) == null ? [] : ["cloudscheduler.googleapis.com"],
  ))

  kms_key = try(var.cmek.key, null)

  # Google's own accounts that read and write with the key on the project's behalf.
  service_agents = var.cmek == null ? {} : {
    artifactregistry = "service-${var.cmek.project_number}@gcp-sa-artifactregistry.iam.gserviceaccount.com"
    compute          = "service-${var.cmek.project_number}@compute-system.iam.gserviceaccount.com"
    dataflow         = "service-${var.cmek.project_number}@dataflow-service-producer-prod.iam.gserviceaccount.com"
    storage          = "service-${var.cmek.project_number}@gs-project-accounts.iam.gserviceaccount.com"
  }
}

resource "google_project_service" "this" {
  for_each = local.services

  project            = var.project
  service            = each.value
  disable_on_destroy = false
}

resource "google_kms_crypto_key_iam_member" "service_agent" {
  for_each = local.service_agents

  crypto_key_id = local.kms_key
  role          = "roles/cloudkms.cryptoKeyEncrypterDecrypter"
  member        = "serviceAccount:${each.value}"
  depends_on    = [google_project_service.this]
}
