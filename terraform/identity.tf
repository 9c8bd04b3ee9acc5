# Two service accounts without keys: the worker runs jobs, the launcher starts them and is acted as, never logged in as.

resource "google_service_account" "worker" {
  project      = var.project
  account_id   = "${var.name}-worker"
  display_name = "Runs the Dataflow workers"
  depends_on   = [google_project_service.this]
}

resource "google_service_account" "launcher" {
  project      = var.project
  account_id   = "${var.name}-launcher"
  display_name = "Starts and watches the Dataflow jobs"
  depends_on   = [google_project_service.this]
}

resource "google_project_iam_member" "this" {
  #checkov:skip=CKV_GCP_49:dataflow.developer starts jobs project-wide, as jobs have no policy of their own; the one account that it may run them as is named below
  for_each = {
    "roles/dataflow.worker"    = google_service_account.worker.email
    "roles/dataflow.developer" = google_service_account.launcher.email
  }

  project = var.project
  role    = each.key
  member  = "serviceAccount:${each.value}"
}

resource "google_service_account_iam_member" "launcher_uses_worker" {
  service_account_id = google_service_account.worker.name
  role               = "roles/iam.serviceAccountUser"
  member             = "serviceAccount:${google_service_account.launcher.email}"
}

resource "google_service_account_iam_member" "launchers_act_as_launcher" {
  for_each = var.launchers

  service_account_id = google_service_account.launcher.name
  role               = "roles/iam.serviceAccountTokenCreator"
  member             = each.value
}

resource "google_artifact_registry_repository_iam_member" "worker" {
  project    = var.project
  location   = var.region
  repository = google_artifact_registry_repository.images.name
  role       = "roles/artifactregistry.reader"
  member     = "serviceAccount:${google_service_account.worker.email}"
}

locals {
  worker   = "serviceAccount:${google_service_account.worker.email}"
  launcher = "serviceAccount:${google_service_account.launcher.email}"

  # Bindings, not members: a new bucket lets every viewer of the project read it and every editor write it, and only an
  # authoritative binding of those legacy roles takes that away. Owners administer both buckets, and read only staging,
  # where terraform keeps the template specs.
  dataset_readers = concat([local.worker, local.launcher], tolist(var.readers), tolist(var.writers))
  dataset_roles = {
    "roles/storage.legacyBucketOwner"  = ["projectOwner:${var.project}"]
    "roles/storage.legacyBucketReader" = local.dataset_readers
    "roles/storage.legacyObjectOwner"  = [local.worker]
    "roles/storage.legacyObjectReader" = local.dataset_readers
    "roles/storage.objectUser"         = concat([local.worker], tolist(var.writers))
  }
  staging_roles = {
    "roles/storage.legacyBucketOwner"  = ["projectOwner:${var.project}"]
    "roles/storage.legacyBucketReader" = [local.worker, local.launcher]
    "roles/storage.legacyObjectOwner"  = ["projectOwner:${var.project}"]
    "roles/storage.legacyObjectReader" = [local.worker, local.launcher]
    "roles/storage.objectUser"         = [local.worker, local.launcher]
  }
}

resource "google_storage_bucket_iam_binding" "dataset" {
  for_each = local.dataset_roles

  bucket  = google_storage_bucket.dataset.name
  role    = each.key
  members = each.value
}

resource "google_storage_bucket_iam_binding" "staging" {
  for_each = local.staging_roles

  bucket  = google_storage_bucket.staging.name
  role    = each.key
  members = each.value
}
