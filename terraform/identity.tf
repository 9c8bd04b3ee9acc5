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
  # where terraform keeps the template specs. The worker's right to write is below.
  dataset_readers = concat([local.worker, local.launcher], tolist(var.readers), tolist(var.writers))
  dataset_roles = {
    "roles/storage.legacyBucketOwner"  = ["projectOwner:${var.project}"]
    "roles/storage.legacyBucketReader" = local.dataset_readers
    "roles/storage.legacyObjectOwner"  = [local.worker]
    "roles/storage.legacyObjectReader" = local.dataset_readers
    "roles/storage.objectUser"         = tolist(var.writers)
  }
  staging_roles = {
    "roles/storage.legacyBucketOwner"  = ["projectOwner:${var.project}"]
    "roles/storage.legacyBucketReader" = [local.worker, local.launcher]
    "roles/storage.legacyObjectOwner"  = ["projectOwner:${var.project}"]
    "roles/storage.legacyObjectReader" = [local.worker, local.launcher]
    "roles/storage.objectUser"         = [local.launcher]
  }
}

resource "google_storage_bucket_iam_binding" "dataset" {
  for_each = { for role, members in local.dataset_roles : role => members if length(members) > 0 }

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

# The worker replaces and deletes everything but the weights, and the templates that name the image of every later job.
# Objects are listed by the bucket's name, which the condition lets pass.
resource "google_storage_bucket_iam_binding" "worker" {
  for_each = {
    dataset = { bucket = google_storage_bucket.dataset.name, kept = "models" }
    staging = { bucket = google_storage_bucket.staging.name, kept = "templates" }
  }

  bucket  = each.value.bucket
  role    = "roles/storage.objectUser"
  members = [local.worker]

  condition {
    title      = "all_but_${each.value.kept}"
    expression = "!resource.name.startsWith(\"projects/_/buckets/${each.value.bucket}/objects/${each.value.kept}/\")"
  }
}
